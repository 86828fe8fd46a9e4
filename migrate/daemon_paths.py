"""Names of what a daemon keeps in its runtime directory."""

GUEST_SOCKET = "guests.sock"
API_SOCKET = "api.sock"
INFO_FILE = "daemon.json"
