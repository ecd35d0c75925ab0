"""A card that is not there: torch.cuda's driver-facing calls answered on the CPU, the order of its work checked."""
