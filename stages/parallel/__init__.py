"""Work done side by side: over the cluster's processes (`cluster`), by threads of one process (`threads`)."""
