"""What pgbgw is compared with, a module each; run as a process of its own: see README.md."""
