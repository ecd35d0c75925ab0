"""DeepSpeed ZeRO behind one door: settings, engine, masters and states, and the optimizer over them."""
