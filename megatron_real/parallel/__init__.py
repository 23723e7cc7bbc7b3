"""Ranks together: process groups, agreement on what failed, rollouts that travel, the device."""
