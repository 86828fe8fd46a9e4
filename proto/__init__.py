"""The wire and nothing else: preamble, frame header, control and guest-socket messages, states. See PROTOCOL.md.

Imports nothing of ``migrate``.
"""

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
