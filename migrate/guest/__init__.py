"""What runs in or beside the guest: userfaultfd, guest memory, and the agent that attaches to a daemon."""
