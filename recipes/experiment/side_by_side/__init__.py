"""Jobs of one run in several processes of this machine, each of which computes as the run itself would."""
