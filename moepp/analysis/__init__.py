"""What runs and models did, for people: pages and tables from metrics.jsonl, and measurements on checkpoints."""
