"""From traffic to the step batches an engine runs: traces, the scheduler's rules, reduction."""
