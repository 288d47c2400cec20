"""The edge: command line, configuration, campaign, Redis supervisor, report."""
