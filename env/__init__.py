"""What is decided: the Recognizer as a Gymnasium environment.

Importing this package registers `Compression-v0` (env/compression.py).
"""

import gymnasium

gymnasium.register("Compression-v0", entry_point="env.compression:make_compression")
