"""The Ray cluster of a run."""

import os

# Ray prints of every worker that died what it might have died of; this package asks why (flowalign.cluster.witness).
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
