"""What third parties implement: the contracts of passes, backends and deployments, and how theirs are found."""
