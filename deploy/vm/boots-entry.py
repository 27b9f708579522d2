"""Adds to an OVMF variable store one boot entry, first in order, that starts a file with load options of its own.

Usage: boots-entry.py STORE FILE OPTIONS. The firmware finds the disk by itself: the entry names only the file, which it
expands to the first file system that holds it (UEFI 2.10, 3.1.2, short-form device paths).
"""

import sys

from virt.firmware.efi import ucs16
from virt.firmware.efi.devpath import DevicePath
from virt.firmware.varstore.edk2 import Edk2VarStore

store, file, options = sys.argv[1:]
edk2 = Edk2VarStore(store)
variables = edk2.get_varlist()
index = variables.add_boot_entry("Linux", DevicePath.filepath(file), bytes(ucs16.from_string(options)))
variables.delete("BootOrder")
variables.append_boot_order(index)
edk2.write_varstore(store, variables)
