"""Ways of making Langevin steps, one file each."""
