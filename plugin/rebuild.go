package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// rebuild puts what the kernel still tells of networks and endpoints into a
// database that is new, before the loop runs and takes every link for a leftover.
// It is new after it was damaged or lost, or after the plugin was removed and made
// again. It returns in words what it did, "" when there was nothing to do.
func rebuild(ctx context.Context, dir string, db *store.DB, k *kernel.Kernel) (string, error) {
	known := false
	if err := db.View(func(tx *store.Tx) error { known = tx.Founded(); return nil }); err != nil || known {
		return "", err
	}
	networks, endpoints, err := k.Recover(ctx)
	if err != nil {
		return "", fmt.Errorf("rebuild the records from the kernel: %w", err)
	}
	restored := 0
	err = db.Update(ctx, func(tx *store.Tx) error {
		// In the same transaction: a process that is killed in between begins again.
		if restored, err = putRecovered(tx, networks, endpoints); err != nil {
			return err
		}
		return tx.SetFounded()
	})
	if err != nil {
		return "", fmt.Errorf("rebuild the records from the kernel: %w", err)
	}
	lost, err := lastSetAside(dir)
	if err != nil || lost == "" && len(networks) == 0 {
		return "", err
	}
	why := "there was no database although this host has networks"
	if lost != "" {
		why = "the database was damaged and is kept as " + filepath.Join(dir, lost)
	}
	return fmt.Sprintf("%s; rebuilt from the kernel: %d networks, %d endpoints (not rebuilt: options, address pools that Docker does not ask for again)",
		why, len(networks), restored), nil
}

// putRecovered writes what the kernel told, as far as it hangs together.
func putRecovered(tx *store.Tx, networks []store.Network, endpoints []store.Endpoint) (restored int, err error) {
	for _, n := range networks {
		n.Recovered = true
		if err := tx.PutNetwork(n); err != nil {
			return 0, err
		}
	}
	for _, e := range endpoints {
		if !slices.ContainsFunc(networks, func(n store.Network) bool { return n.ID == e.Network && n.VNI == e.VNI }) {
			continue
		}
		if _, err := tx.PutEndpoint(e); err != nil {
			return 0, err
		}
		restored++
	}
	return restored, nil
}

// lastSetAside returns the name of the newest damaged database, or "".
func lastSetAside(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	last := ""
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), databaseFile+".bad-") {
			last = max(last, e.Name()) // the names end in Unix seconds of equal length
		}
	}
	return last, nil
}
