"""Parts that several algorithms share; an algorithm imports these and never another algorithm."""
