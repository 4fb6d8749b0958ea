"""Where jobs run: `base.py` holds the engine and the interface of its workers; the other files implement kinds of workers."""
