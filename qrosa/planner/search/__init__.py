"""Search: from a memory cap to settings, their alternatives, and how far each lever reaches."""
