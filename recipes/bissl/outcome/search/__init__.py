"""Search of learning rate and weight decay: enumerated trials, shared by any number of workers through files."""
