"""userfaultfd and PAGEMAP_SCAN, complete and typed: usable without the rest of the product.

    with Userfaultfd.open(Feature.MINOR_SHMEM) as userfaultfd:
        userfaultfd.register(address, size_bytes, Mode.MISSING | Mode.MINOR)
        for event in userfaultfd.read_events():
            userfaultfd.continue_(event.address, 4096)

This module is the one door; the parts: constants.py the bits by name, descriptor.py the calls, outcomes.py how a fill ended,
events.py what read(2) tells, pagemap.py the scan, errors.py what raises. Below them uffd.c, one function a call, and kernel.h.
What the kernel does is shown in tests/kernel/, in each memory type.
"""

from migrate.uffd import pagemap
from migrate.uffd.constants import Feature, Ioctl, Mode, PageFaultFlag
from migrate.uffd.descriptor import READ_MAX, Supported, Userfaultfd, features_of, probe
from migrate.uffd.errors import FeaturesMissingError, PagemapScanError, UserfaultfdError, UserfaultfdUnavailableError
from migrate.uffd.events import Event, Fork, PageFault, Remap, Remove, UnknownEvent, Unmap
from migrate.uffd.outcomes import Filled, Operation, Outcome, outcome_of
from migrate.uffd.postcopy import FEATURES_ALLOWED, MODES_POSTCOPY, open_for_postcopy, register_for_postcopy

__all__ = [
    "FEATURES_ALLOWED",
    "MODES_POSTCOPY",
    "READ_MAX",
    "Event",
    "Feature",
    "FeaturesMissingError",
    "Filled",
    "Fork",
    "Ioctl",
    "Mode",
    "Operation",
    "Outcome",
    "PageFault",
    "PageFaultFlag",
    "PagemapScanError",
    "Remap",
    "Remove",
    "Supported",
    "UnknownEvent",
    "Unmap",
    "Userfaultfd",
    "UserfaultfdError",
    "UserfaultfdUnavailableError",
    "features_of",
    "open_for_postcopy",
    "outcome_of",
    "pagemap",
    "probe",
    "register_for_postcopy",
]
