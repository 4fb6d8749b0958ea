"""Where jobs run. `base.py` holds the engine and what it asks of its workers; each other file is one kind of them."""
