"""Problems whose lower level is no smooth minimum, and operators that are not symmetric."""
