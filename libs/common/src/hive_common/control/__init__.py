"""Orders that stop what runs (law 9): what they say, who may give them, and what is stopped now."""
