"""`lipcert evidence`: one folder for the engineer who signs for a classifier, see docs/evidence.md."""
