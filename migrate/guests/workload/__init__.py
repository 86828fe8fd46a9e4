"""The built-in guest: native threads at work on guest memory that check every page they touch."""
