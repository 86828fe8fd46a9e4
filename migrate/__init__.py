"""postcopy: live migration of running guests. README.md tells the life of one page; PROTOCOL.md the wire."""

__version__ = "0.1.0"
