"""The plan: what a run will take, in bytes and seconds, and the settings that fit, from shapes alone."""
