complete --keep-order --exclusive --command loopengine --arguments "(LOOPENGINE_COMPLETE=fish loopengine -- (commandline --current-process --tokenize --cut-at-cursor) (commandline --current-token))"
