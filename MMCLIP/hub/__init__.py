"""Publishing: what a run leaves for others to read, the model card made of it, and the way to a Hub repository."""
