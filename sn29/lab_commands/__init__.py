"""`sn29 lab ...`: what the lab's numbers look like on the command line."""
