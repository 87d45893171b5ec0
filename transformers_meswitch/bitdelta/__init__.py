"""Coming from BitDelta (arXiv 2402.10193): its diffs as delta repos."""
