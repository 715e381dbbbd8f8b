#!/usr/bin/env python3
"""examples/python without a profile and with the one that is shipped; a broken file and wrong numbers are exceptions.

usage: python_example_test.py <libthimble.so> <directory for the virtual environment>
"""
import os
import subprocess
import sys
import tempfile

here = os.path.dirname(os.path.abspath(__file__))
source = os.path.dirname(os.path.dirname(here))
sys.path.insert(0, os.path.join(source, "tests", "support"))
from llama_server import enter_environment  # noqa: E402

library, venv = sys.argv[1:]
try:
    import numpy  # noqa: F401
except ImportError:
    enter_environment(venv, os.path.join(source, "examples", "python", "requirements.txt"))

example = os.path.join(source, "examples", "python", "attend.py")
profile = os.path.join(source, "profiles", "SmolLM2-135M-Instruct.Q4_1.thimble.gguf")
subprocess.run([sys.executable, example, library], check=True)
subprocess.run([sys.executable, example, library, profile], check=True)
with tempfile.NamedTemporaryFile() as broken:
    broken.write(b"GGUF and nothing else")
    broken.flush()
    refused = subprocess.run([sys.executable, example, library, broken.name], capture_output=True, text=True)
    assert refused.returncode != 0 and "not a usable profile" in refused.stderr, refused.stderr
