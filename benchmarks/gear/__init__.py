"""What the benchmarks share: real texts, workers as users start them, rivals in processes of their own, reports."""
