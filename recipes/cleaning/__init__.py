"""Cleaning: find the wrong labels of a labelled image set, given a small part of it that is trusted."""
