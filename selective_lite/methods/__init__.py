"""The methods, one file each: a function that yields phases over the four verbs."""
