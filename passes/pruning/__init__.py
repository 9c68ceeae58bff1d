"""What every structural pass shares: which groups may be pruned, how many positions stay, which ones."""
