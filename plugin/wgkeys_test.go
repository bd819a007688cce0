package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestNewIdentityHasANewKey: the folder may be a copy of another host's, whose host.key was
// removed as we advise. That holds also if the process ends between any two steps.
func TestNewIdentityHasANewKey(t *testing.T) {
	dir := t.TempDir()
	load := func() (store.HostID, store.WGKey) {
		t.Helper()
		id, keys, err := loadKeys(dir, 4798)
		if err != nil {
			t.Fatal(err)
		}
		told, err := keys.tunnel()
		if err != nil || len(told.Keys) != 1 {
			t.Fatalf("it tells %+v, %v", told, err)
		}
		return id.ID, told.Keys[0]
	}
	id, key := load()
	if again, k := load(); again != id || k != key {
		t.Errorf("a restart makes %s with %s of %s with %s", again, k, id, key)
	}
	former, err := os.ReadFile(filepath.Join(dir, wgKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		ends func() // what has been done of a start without host.key
	}{
		{"before anything", func() {}},
		{"after the old key went", func() { _ = os.Remove(filepath.Join(dir, wgKeyFile)) }},
		{"after the identity was made", func() {
			if _, err := store.LoadIdentity(dir, wgKeyFile); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		if err := os.Remove(filepath.Join(dir, "host.key")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, wgKeyFile), former, 0o600); err != nil {
			t.Fatal(err)
		}
		step.ends()
		if newID, newKey := load(); newID == id || newKey == key {
			t.Errorf("ended %s: the host is %s with key %s, was %s with %s", step.name, newID, newKey, id, key)
		}
	}
}
