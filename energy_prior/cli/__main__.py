"""`python -m energy_prior.cli`, as `accelerate launch -m` starts it."""

from energy_prior.cli.main import main

raise SystemExit(main())
