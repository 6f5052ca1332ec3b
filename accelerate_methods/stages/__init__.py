"""What a method subclasses, is given and gives back: one file per stage, signals, budget, errors."""
