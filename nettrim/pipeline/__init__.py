"""A whole network: schedules, execution, the ledger, run directories."""
