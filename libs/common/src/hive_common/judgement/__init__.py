"""How results are judged: what is equal, which quorum decides, what joins make of it, and whom to trust how far.

All of it is pure, without clock, chance or I/O, because the scheduler decides by it and the auditor applies it
again to what the log says.
"""
