"""Jobs on a Ray cluster: submit, follow, list, stop and resume them from another machine."""
