"""python -m thimble_kv"""
from .program import main

main()
