"""The paper's metrics and their protocol, retention, and intervals. Heavy libraries are imported on first use."""
