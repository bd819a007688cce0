package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// rebuiltMark is the file that names the last damaged database after which the
// records were rebuilt. Without it a process killed in between would start with an
// empty database and take every link for a leftover.
const rebuiltMark = "rebuilt"

// rebuild puts back what the kernel still tells of networks and endpoints after
// the database was lost, before the loop runs. It returns in words what it did, ""
// when there was nothing to do.
func rebuild(ctx context.Context, dir string, db *store.DB, k *kernel.Kernel) (string, error) {
	lost, err := lastSetAside(dir)
	if err != nil || lost == "" {
		return "", err
	}
	mark := filepath.Join(dir, rebuiltMark)
	done, err := os.ReadFile(mark)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if string(done) == lost {
		return "", nil
	}
	networks, endpoints, err := k.Recover(ctx)
	if err != nil {
		return "", fmt.Errorf("rebuild the records from the kernel: %w", err)
	}
	restored := 0
	err = db.Update(ctx, func(tx *store.Tx) error {
		restored, err = putRecovered(tx, networks, endpoints)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("rebuild the records from the kernel: %w", err)
	}
	text := fmt.Sprintf("the database was damaged and is kept as %s; rebuilt from the kernel: %d networks, %d endpoints (not rebuilt: options, address pools that Docker does not ask for again)",
		filepath.Join(dir, lost), len(networks), restored)
	return text, os.WriteFile(mark, []byte(lost), 0o600)
}

// putRecovered writes what the kernel told, as far as it hangs together.
func putRecovered(tx *store.Tx, networks []store.Network, endpoints []store.Endpoint) (restored int, err error) {
	for _, n := range networks {
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
