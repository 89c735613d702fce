"""What any experiment needs: run folders, ranks, stages, events, tables. It knows no data and no model."""
