"""Who may do what: tokens, certificates, roles, the audit log. Knows no run, and nothing of how calls come."""
