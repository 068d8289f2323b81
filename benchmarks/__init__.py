"""Speed and memory of this code against the plain implementation, both timed in the same run (`make bench`)."""
