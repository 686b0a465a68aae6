"""Who a process is among the ranks, and how a command ends: watchdog, signals, standard output, exit status."""
