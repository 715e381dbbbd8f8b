"""The command `thimble` of an installed wheel."""
import os
import sys

from . import home


def main():
    program = os.path.join(home(), "thimble")
    os.execv(program, [program, *sys.argv[1:]])
