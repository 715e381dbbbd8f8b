"""The wheel's tag: any Python 3, one kind of machine (THIMBLE_MACHINE, which make-wheel sets). auditwheel then writes the glibc
that it needs into it."""
import os

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Tag(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_" + os.environ["THIMBLE_MACHINE"]
