"""Training: schedules, one update for any module and objective, checkpoints, runs over many processes."""
